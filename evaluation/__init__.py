"""The evaluation harness's tasks, answered by this runtime. Knows tasks and models, no files."""

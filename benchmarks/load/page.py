"""The page of a run of serving.py, from its document."""

from __future__ import annotations

from typing import Any

_PAGE = """# The server under load

{model} ({recipe}) behind `halfweave serve`, clients on the same machine. Made by
`{command}` on {date}; {hardware}; halfweave {halfweave}, torch {torch}, python {python}.

## Clients at once

Every client streams {tokens} tokens, greedy; a round starts all at once and ends with the last.
Median of the rounds with (least..greatest), the batches in turns.

| clients | tokens/s, all together | of one client's | gap between tokens, p50 |
| --- | --- | --- | --- |
{speeds}

## A soak

{clients} clients for {seconds:.0f} s, one request after another: prompts of 5 to 600 words, answers
of 4 to 96 tokens, 5 % of the clients hang up in the middle. A refusal (429) is not counted as an
error: the queue is finite, and the client comes again.

| | |
| --- | --- |
| requests | {requests} |
| finished whole | {finished} |
| given up by their client | {aborted} |
| refused with 429 | {refused_429} |
| errors other than 429 | {errors_other_than_429} |
| memory, after warm-up and at the end | {rss_start_mib:.0f} and {rss_end_mib:.0f} MiB |
| file descriptors | {fds_start} and {fds_end} |
| threads | {threads_start} and {threads_end} |
| pages of keys and values still held | {blocks_leaked} |
| tokens/s over the whole time | {tokens_per_s:.0f} |
| first token, p50, first and second half | {ttft_ms_p50_early:.0f} and {ttft_ms_p50_late:.0f} ms |
| gap between tokens, p50 | {itl_ms_p50:.1f} ms |
| gap between tokens, p99, halves | {itl_ms_p99_early:.0f} and {itl_ms_p99_late:.0f} ms |

## A full server

It says so with 429 after {full50:.1f} ms (median), {full99:.1f} ms (p99 of 200), while it works on
what it has.
"""


def page(document: dict[str, Any]) -> str:
    """Markdown."""
    soak, first = document["soak"], document["throughput"][0]["tokens_per_s"]
    speeds = [
        f"| {each['batch']} | {each['tokens_per_s']:.0f} ({each['low']:.0f}..{each['high']:.0f}) "
        f"| {each['tokens_per_s'] / first:.2f}x | {each['itl_ms_p50']:.1f} ms |"
        for each in document["throughput"]
    ]
    tokens = document["command"].partition("--tokens ")[2].split()[0]
    about = {key: document[key] for key in ("model", "recipe", "command", "date", "hardware")}
    return _PAGE.format(
        **about,
        **document["versions"],
        **soak,
        tokens=tokens,
        speeds="\n".join(speeds),
        full50=document["queue_full_ms_p50"],
        full99=document["queue_full_ms_p99"],
    )

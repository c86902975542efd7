"""How many positions of one sequence a page of keys and values holds, on every device."""

PAGE_POSITIONS = 16

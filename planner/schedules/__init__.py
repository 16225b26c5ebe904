"""What an attention group does on the wire, as data: rounds of messages and tasks, who holds what, the checker."""

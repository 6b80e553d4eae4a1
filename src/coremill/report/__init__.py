"""What a run did, for people: one summary, printed in a terminal and written as a page."""

"""Who is in the slots, and what is on its way there."""

"""What coming layers will ask for, and which experts are moved ahead of it."""

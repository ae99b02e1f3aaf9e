"""The effects: device slots, transfers, host threads, clocks."""

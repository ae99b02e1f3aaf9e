"""How a planned layer is carried out: the layered step, and its overlapped and callback executors."""

"""Who runs the shapes: one module for each system, imported only in its own process."""

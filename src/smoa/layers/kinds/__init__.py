"""The kinds of layers that SMoA adapts, one file for each, and the table of them."""

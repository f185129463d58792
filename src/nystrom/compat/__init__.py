"""Stand-ins for the Nyström attention of other libraries: their constructor, call and state dict, our maths."""

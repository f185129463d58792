"""Whether a pretrained encoder's attention can be exchanged, and with what settings: a report in one HTML file."""

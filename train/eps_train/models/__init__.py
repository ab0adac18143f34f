"""Network families and how a network is named."""

"""How a trainer's weights reach inference engines: kinds of transfer, and the sync that proves them."""

"""Publish a trainer's weights to inference engines, by one of several deliveries, and prove that they serve them."""

"""What notebooks use to run experiments; nothing else of kit imports it."""

"""What adapters are worth: pictures by every method, metrics, one report."""

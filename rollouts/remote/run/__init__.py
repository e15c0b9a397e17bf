"""One run, seen from here: its record, its code on the host, its results on their way back."""

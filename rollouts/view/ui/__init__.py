"""The page of `deploy ui`: runs, curves, samples, in a browser on this machine. It needs the `view` extra."""

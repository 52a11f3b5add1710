"""Data sets as samples: recordings, the images paired with them, and sequences of both."""

"""Dense prediction: a map of outputs from the windows of a recording, for segmentation and depth alike."""

"""From a source of images to batches on the mesh."""

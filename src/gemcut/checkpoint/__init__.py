"""Files and tensors: where a checkpoint is, streaming readers, the strict loader, and the writer."""

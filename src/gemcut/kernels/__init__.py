"""Fast paths per device, by family. A CUDA source stands beside the Python that launches it; none knows of layers."""

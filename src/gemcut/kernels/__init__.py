"""Fast paths per device. Each kernel is one small file with its plain torch twin beside it."""

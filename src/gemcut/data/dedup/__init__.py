"""Steps that remove what is there twice, exactly or nearly."""

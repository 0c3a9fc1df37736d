"""Raw columns in, model inputs out: the one definition that samples, training and the server share."""

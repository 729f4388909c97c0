"""What a format does to a tensor: block formats and which tensor gets which."""

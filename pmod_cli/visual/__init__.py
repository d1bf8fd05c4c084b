"""Pictures: where vision tokens lie on a picture, which of them each layer kept, and the look that all pictures share."""

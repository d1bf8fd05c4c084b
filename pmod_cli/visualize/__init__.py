"""Pictures: where vision tokens lie on a picture, which of them each layer kept, and the look all pictures share."""

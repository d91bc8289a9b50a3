"""From a trained model to text and to other programs."""

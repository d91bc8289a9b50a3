"""The trainer: data, the training step, the command line. It imports hola_jax; hola_jax never imports it."""

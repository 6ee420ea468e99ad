"""Small trainings of the reference models on data that comes with Python packages: `tfkern train` and the demo."""

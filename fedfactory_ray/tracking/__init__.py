"""What a person sees: MLflow runs, pictures, bars."""

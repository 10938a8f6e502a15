"""The main job: phases in a session, what they tell a person and MLflow, and a report at the end."""

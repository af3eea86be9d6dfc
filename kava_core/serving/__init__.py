"""An OpenAI-compatible server for a trained student, or for the teacher that it learnt from."""

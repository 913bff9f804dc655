"""The embedded models, and the judge that is trained for them. Imports judges, training and below."""

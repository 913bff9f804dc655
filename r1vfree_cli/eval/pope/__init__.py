"""POPE: yes/no questions about objects that are, or are not, in a picture."""

"""A job that goes on with the machines that are there: tools/elastic.py."""

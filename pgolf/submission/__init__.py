"""Submissions to the contest: one script that holds the package's code, and the record's folder."""

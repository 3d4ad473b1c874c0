"""The result of a run: a table for the console (`table`) and one HTML page (`html`)."""

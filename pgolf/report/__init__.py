"""What a run came to: a table for the console (`table`) and one HTML page (`html`)."""

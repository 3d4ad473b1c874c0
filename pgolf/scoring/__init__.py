"""Bits per byte: the rule (`bpb`), sliding windows (`windows`), scoring an artifact (`job`)."""

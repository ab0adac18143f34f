"""Readers of data sets: each finds the files and returns an `images.Source`.

A reader raises DataError, in one line that names the file and the remedy, for what is missing,
damaged or unusable. Nothing is downloaded unless the user asked for it.
"""

"""Reading and writing files so that nothing is half done, and nothing outside a folder is touched."""

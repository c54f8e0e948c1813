"""How one block is read off a recording: one file for each way in which blocks are built."""

"""The commands of ``captum-lnstat``, one a file; each is imported when it is run."""

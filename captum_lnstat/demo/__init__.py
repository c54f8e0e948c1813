"""The demo page: ``captum-lnstat demo``. Gradio, the extra ``demo``, is imported once it runs."""

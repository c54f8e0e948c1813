"""The demo page: ``captum-lnstat demo``. Needs the extra ``demo`` (Gradio), which only ``app`` and ``server`` import."""

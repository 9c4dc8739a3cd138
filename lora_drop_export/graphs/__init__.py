"""refresh.onnx and lora.onnx, neutral: nodes, matching, surgery. No target and no file."""

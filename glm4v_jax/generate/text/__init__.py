"""From tokens to text: thoughts, boxes, stop strings, repetition."""

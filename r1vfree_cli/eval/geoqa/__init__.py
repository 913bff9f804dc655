"""GeoQA: R1-V's evaluation on geometry problems."""

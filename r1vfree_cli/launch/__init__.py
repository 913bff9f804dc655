"""From a recipe to processes: preflight, the plan, the job, what is shown of it. No torch. Imports run, data and below."""

def write_report(study, records, min_steps, target_margin):
    return f"{len(records)} trials"
